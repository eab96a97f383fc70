"""What a user calls, one file a loss: its arguments, its formula, its checks."""
