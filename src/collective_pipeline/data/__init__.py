"""Data sets as tensors: read, split, augmented; nothing here knows a model or Kedro."""
