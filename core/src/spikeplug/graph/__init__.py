"""Networks as graphs of operations: capture, roles, where activations become spikes. Imports nothing by itself."""
