"""The numeric tests on the processors that this one can stand in for; `make test-processors`.

Another processor has other instructions, so it sums in another order: a test whose tolerance is one machine's fails
there. What a library takes of this processor can be held back:

- ATen: by `ATEN_CPU_CAPABILITY`, which it does not check: what is not there ends the process, and is left out here;
- oneDNN, which multiplies in bf16: by `ONEDNN_MAX_CPU_ISA`;
- MKL, which multiplies in fp32: by `MKL_CBWR`; `COMPATIBLE` is what any x86 processor has.
"""

import os
import subprocess
import sys

import torch

CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")
"""In the order in which each includes those before."""


def settings() -> dict[str, str]:
    """Return for each setting, as environment variables with a space between, why it cannot be run; mostly nothing."""
    here = torch.backends.cpu.get_cpu_capability()
    known = CAPABILITIES[: CAPABILITIES.index(here) + 1] if here in CAPABILITIES else CAPABILITIES[:1]
    x86 = "" if len(known) > 1 else "this is no x86 processor with AVX2"
    found = {
        f"ATEN_CPU_CAPABILITY={name.lower()} OMP_NUM_THREADS={threads}": ""
        if name in known
        else f"this processor has {here}"
        for name in CAPABILITIES
        for threads in (1, 2)
    }
    found["ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1"] = x86
    found["MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1"] = (
        "" if torch.backends.mkl.is_available() else "torch has no MKL here"
    )
    return found


def main(arguments: list[str]) -> int:
    """Run pytest in each setting with these further arguments; return how many of them fail."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        os.environ.pop(name, None)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # More threads than cores: none of them may spin.
    told = {}
    for setting, missing in settings().items():
        print(f"\n== {setting}", flush=True)
        environment = os.environ | dict(pair.split("=") for pair in setting.split())
        command = [sys.executable, "-m", "pytest", "-m", "numeric", "--quiet", *arguments]
        failed = not missing and subprocess.run(command, env=environment).returncode
        told[setting] = f"skipped: {missing}" if missing else "failed" if failed else "passed"
    print("\n" + "\n".join(f"{setting}: {outcome}" for setting, outcome in told.items()))
    return sum(outcome == "failed" for outcome in told.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
