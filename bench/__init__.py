"""Measurements: ours beside the eager reference and torch.compile of it. Run them with `pytest bench/`.

    bench_ttl.py    the suite    cases.py       what is measured and by which sides
    measure.py      how          operations.py  how many operations the results really need
    report.py       closing table and JSON      NOTES.md    the figures of each version
    gpu.py          a script of its own, for a GPU: gpu_cases.py, gpu_measure.py, gpu_report.py; traffic.py counts bytes
    tune.py         measures launch configurations on a GPU and rewrites kernels/configs.json (tune_problems.py)
    scaling.py      a script of its own: how the cost of ours grows with length, batch and past tasks
"""
