"""Does a collective of networks use its parameters better than one network of the same size?"""

__version__ = "0.1.0"
