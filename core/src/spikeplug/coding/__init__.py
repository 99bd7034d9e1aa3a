"""Numbers to spikes and back: codes and neurons, and the modules of a network in which that happens."""
