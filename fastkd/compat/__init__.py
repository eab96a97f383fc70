"""Other libraries' losses by their own names, computed by fastkd."""
