"""Does a collective of networks use its parameters better than one network of the same size?"""

import os

__version__ = "0.1.0"

# How many queues a GPU has for this process, which CUDA reads when it is used first. Streams that share one wait for
# each other: with the usual eight, a network and the decoder of its images took turns, at 0.65 of the network's speed.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
