"""The networks: stacked layers, multilayer perceptrons, the collective, and matching them in size."""
