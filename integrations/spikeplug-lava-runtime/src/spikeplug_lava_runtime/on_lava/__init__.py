"""Integer networks on Lava's CPU simulator. Needs Python 3.10 and lava-nc.

Lava runs every file of the folder in which it finds a Process, so importing a module of this package does nothing else.
"""
