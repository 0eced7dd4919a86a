"""Functions on lists of cores: no types, no classes that hold them."""
