"""One thread for all tests: two on busy cores were 12 times slower."""

import torch

torch.set_num_threads(1)
