"""balance: one file a method, each of them one rule."""
