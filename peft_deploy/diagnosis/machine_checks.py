"""The checks that need nothing but the metadata of what is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from peft_deploy.diagnosis.conflicts import find_conflicts
from peft_deploy.diagnosis.extras import (
    BASE,
    DISTRIBUTION,
    ExtraState,
    PackageState,
    installed_packages,
    names_of_interest,
    own_requirements,
    read_extras,
)
from peft_deploy.diagnosis.machine import MKL_FAST, MKL_SWITCH, Machine, this_machine
from peft_deploy.diagnosis.report import BASE_INSTALL, Check, Diagnosis, Verdict
from peft_deploy.diagnosis.versions import fits

RUNTIMES = ("cpu", "gpu")
CUDA = "CUDAExecutionProvider"


def check_machine(
    installed: Mapping[str, str] | None = None, machine: Machine | None = None
) -> Diagnosis:
    """Everything that can be said without running anything.

    Args:
        installed: distribution → version; what is installed here when not given.
        machine: this one when not given.
    """
    requirements = own_requirements()
    names = names_of_interest(requirements)
    here = installed is None
    found = installed_packages(names) if installed is None else installed
    machine = machine or this_machine()
    extras = read_extras(requirements, found)
    checks = [_python(machine), *_base(extras[BASE], importing=here), _runtime(extras)]
    checks += [_paddle(extras["paddle"]), *_conflicts(found, machine)]
    if here and any(extras[name].wanted for name in RUNTIMES):
        checks.append(_providers(gpu=extras["gpu"].wanted))
    checks.append(_processor(machine))
    return Diagnosis(
        machine=machine,
        packages={name: found.get(name) for name in names},
        extras={name: state.complete for name, state in extras.items()},
        checks=tuple(checks),
    )


def _python(machine: Machine) -> Check:
    bounds = metadata.metadata(DISTRIBUTION)["Requires-Python"].replace(" ", "")
    detail = f"{machine.implementation} {machine.python} on {machine.system}"
    if fits(machine.python, bounds):
        return Check("Python", Verdict.PASSED, detail)
    return Check(
        "Python",
        Verdict.FAILED,
        f"{detail}; peft-deploy is made for {bounds}",
        "use Python 3.10, 3.11 or 3.12",
    )


def _base(state: ExtraState, *, importing: bool) -> Iterator[Check]:
    if state.faults:
        yield Check(BASE_INSTALL, Verdict.FAILED, _faults(state), state.command)
        return
    broken = {p: _import_error(p) for p in state.packages} if importing else {}
    for package, error in broken.items():
        if error is not None:
            fix = f"pip install --force-reinstall '{package.requirement}'"
            yield Check(BASE_INSTALL, Verdict.FAILED, error, fix)
    if not any(broken.values()):
        yield Check(BASE_INSTALL, Verdict.PASSED, _versions(state.packages))


def _import_error(package: PackageState) -> str | None:
    try:
        importlib.import_module(package.name.replace("-", "_"))
    except Exception as exc:  # whatever a damaged or mismatched package raises
        return f"{package.name} {package.version} cannot be imported: {type(exc).__name__}: {exc}"
    return None


def _runtime(extras: Mapping[str, ExtraState]) -> Check:
    title = "running bundles"
    wanted = [extras[name] for name in RUNTIMES if extras[name].wanted]
    if not wanted:
        return Check(
            title,
            Verdict.FAILED,
            "neither onnxruntime nor onnxruntime-gpu is installed",
            f"{extras['cpu'].command}, or with [gpu] for CUDA",
        )
    for state in wanted:
        if not state.complete:
            return Check(title, Verdict.FAILED, _faults(state), state.command)
    return Check(title, Verdict.PASSED, _versions([p for s in wanted for p in s.packages]))


def _paddle(state: ExtraState) -> Check:
    title = "training and export"
    if not state.wanted:
        return Check(
            title,
            Verdict.INFO,
            "the extra paddle is not installed; bundles run without it",
            state.command,
        )
    if not state.complete:
        return Check(title, Verdict.FAILED, _faults(state), state.command)
    return Check(title, Verdict.PASSED, _versions(state.packages))


def _conflicts(installed: Mapping[str, str], machine: Machine) -> Iterator[Check]:
    title = "known bad combinations"
    found = find_conflicts(installed, machine.python)
    for conflict in found:
        yield Check(title, Verdict.FAILED, conflict.problem, conflict.fix)
    if not found:
        yield Check(title, Verdict.PASSED, "none is installed")


def _providers(*, gpu: bool) -> Check:
    title = "execution providers"
    try:
        providers: list[str] = importlib.import_module("onnxruntime").get_available_providers()
    except Exception as exc:  # a half-overwritten onnxruntime fails in many ways
        return Check(
            title,
            Verdict.FAILED,
            f"onnxruntime cannot be used: {type(exc).__name__}: {exc}",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'peft-deploy[cpu]' or "
            "'peft-deploy[gpu]'",
        )
    if gpu and CUDA not in providers:
        return Check(
            title,
            Verdict.FAILED,
            f"onnxruntime-gpu is installed but has no {CUDA}; there is: {', '.join(providers)}",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'peft-deploy[gpu]'",
        )
    return Check(title, Verdict.PASSED, ", ".join(providers))


def _processor(machine: Machine) -> Check:
    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    memory = "" if machine.memory is None else f", {machine.memory / 1e9:.1f} GB of memory"
    detail = f"{machine.processor or 'unknown processor'}, {cores}{memory}"
    if machine.amd:
        if machine.mkl_switch in (None, MKL_FAST):
            detail += f"; Paddle's MKL is given {MKL_SWITCH}={MKL_FAST} for its fast path on AMD"
        else:
            return Check(
                "processor",
                Verdict.INFO,
                f"{detail}; {MKL_SWITCH} is {machine.mkl_switch} in the environment, which keeps "
                "Paddle's MKL on its slow path on AMD",
                f"unset {MKL_SWITCH}, which peft-deploy then sets to {MKL_FAST}",
            )
    return Check("processor", Verdict.INFO, detail)


def _faults(state: ExtraState) -> str:
    missing = [package.name for package in state.faults if package.version is None]
    parts = [f"missing {', '.join(missing)}"] if missing else []
    parts += [
        f"{package.name} {package.version} is not {package.requirement.bounds}"
        for package in state.faults
        if package.version is not None
    ]
    whole = "the base install" if state.name == BASE else f"the extra {state.name}"
    return f"{whole} is incomplete: {'; '.join(parts)}"


def _versions(packages: Sequence[PackageState]) -> str:
    return ", ".join(f"{p.name} {p.version}" for p in packages)
