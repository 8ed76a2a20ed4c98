"""`teracon report` and `teracon doctor`: look at a run, look at the machine."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from teracon_fast import __version__
from teracon_fast.cli import extras
from teracon_fast.cli.console import console, say, table


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    file_format: Annotated[str, typer.Option("--format", help="Format of the plots: png, pdf or svg.")] = "png",
    draw: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the plots, or only print the tables.")] = True,
) -> None:
    """Print the results of a run and write its plots to RUN/report; works while the run is still training."""
    from teracon_fast.report.run_report import load_run, method_rows, summary_rows, task_rows, write_report

    record = load_run(run)
    table(f"Test metrics of {record.path.resolve().name} ({record.method})", *summary_rows(record))
    table("Training", *task_rows(record))
    heading, rows = method_rows(record)
    if rows:
        table(f"After the last epoch of each task, by {record.method}", heading, rows)
    if draw:
        page, *images = write_report(run, file_format)
        say(f"wrote {page} and {len(images)} plots: {', '.join(image.name for image in images)}")


@dataclass(frozen=True)
class Finding:
    """One line of `teracon doctor`: status is "ok", "none" (optional, missing) or "broken"; `advice` says what to do."""

    name: str
    status: str
    found: str
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for bug reports and scripts.")] = False,
) -> None:
    """Check this installation and this machine, and say what to do about anything missing."""
    findings = [*_software(), *_hardware(), *_packages(), _self_check()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        marks = {"ok": "[green]ok[/]", "none": "[yellow]--[/]", "broken": "[bold red]!![/]"}
        out = console()
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            out.print(f" {marks[finding.status]}  {finding.name:<{width}}  ", end="")
            out.print(finding.found, markup=False)
            if finding.advice:
                out.print(f"{'':{width + 6}}-> {finding.advice}", markup=False)
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)


def _software() -> list[Finding]:
    import torch

    import teracon_fast
    from teracon_fast.ops import backends, native

    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    reason = native.missing_reason()
    extension = str(native.library()) if reason is None else None
    needed = torch.cuda.is_available()
    state = backends.env_report()
    return [
        Finding("teracon_fast", "ok", f"{__version__} in {Path(teracon_fast.__file__).parent}"),
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        Finding("torch", "ok", f"{torch.__version__}, CPU code for {torch.backends.cpu.get_cpu_capability()}"),
        _optional("C++ compiler", compiler, "not found", "only needed to build the CPU kernels; apt install g++"),
        _optional(
            "compiled extension", extension, (reason or "").split(";")[0],
            "the torch backend is used instead; reinstall with a C++ compiler",
        ),
        _optional(
            "Triton", _version("triton"), "not installed", "pip install triton" if needed else "only useful with a GPU"
        ),
        *(
            Finding(f"backends of {operation}", "ok", f"{', '.join(names)} (auto: {state['auto'][operation]})")
            for operation, names in state["backends"].items()
        ),
    ]  # fmt: skip


def _optional(name: str, found: str | None, missing: str, advice: str) -> Finding:
    return Finding(name, "ok", found) if found else Finding(name, "none", missing, advice)


def _hardware() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    few = "set OMP_NUM_THREADS or --threads to use all cores" if threads < cores else ""
    many = "more threads than cores slow training down; set OMP_NUM_THREADS" if threads > cores else ""
    findings = [Finding("CPU", "ok", f"{cores} cores usable, {threads} threads in use", few or many)]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            size = properties.total_memory / 2**30
            found = f"{properties.name}, {size:.0f} GiB, compute capability {properties.major}.{properties.minor}"
            findings.append(Finding(f"GPU cuda:{index}", "ok", found))
    elif torch.version.cuda or getattr(torch.version, "hip", None):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        findings.append(Finding("GPU", "none", f"not usable, although torch is built for {built}", "check the driver"))
    else:
        advice = "if there is a GPU, install a CUDA build of torch"
        findings.append(Finding("GPU", "none", "not usable: torch is a CPU build", advice))
    return findings


def _packages() -> list[Finding]:
    findings = []
    for package, (purpose, command) in extras.PACKAGES.items():
        found = f"{_version(package) or 'installed'}, for {purpose}" if extras.installed(package) else None
        findings.append(_optional(package, found, f"not installed, for {purpose}", command))
    return findings


def _self_check() -> Finding:
    """Compare the two modes of the encoder: finds broken kernels and a miscompiled torch."""
    import torch

    from teracon_fast import FastTCN, Request

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = FastTCN(num_items=50, channels=32, labels=[50, 7], dilations=(1, 4))
            x = torch.randint(1, 50, (5, 30))
            x[:, :11] = 0
            last = model.encode(x, [Request(1)])[0]
            everything = model.encode_all(x, task=1)
            error = float((last - everything.hidden[everything.row_of[:, -1]]).abs().max() / last.abs().max())
    except Exception as failure:  # whatever it is, report it
        return Finding("self-check", "broken", f"{type(failure).__name__}: {failure}", "please report this as a bug")
    if not error < 1e-4:
        found = f"two ways of encoding differ by {error:.1e}"
        return Finding("self-check", "broken", found, "please report this as a bug")
    return Finding("self-check", "ok", f"two ways of encoding agree to {error:.0e} (relative)")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
