"""Measurements: ours beside PyTorch. `make bench` and its relatives run them; NOTES.md has the figures of each version.

    harness.py  how everything is measured: cases, sides in turns, processes    device.py   clocks, memory and rates
    record.py   tables, records, plots, options                                 shapes.py   sizes, inputs, operations
    steps.py    all calls of the trainer and of methods                         network.py  TERACON (`pytest bench/`)
    methods.py  the other methods                                               scaling.py  growth of the cost
    heads.py    very large catalogues                                           adam.py     Adam on an embedding
    gpu.py      all of it on a GPU                                              tune.py     launch configurations
"""
