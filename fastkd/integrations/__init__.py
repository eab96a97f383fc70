"""fastkd in the training loops of other libraries, a module for each.

Nothing is imported here: `import fastkd.integrations.transformers` needs transformers, and so on.
"""
