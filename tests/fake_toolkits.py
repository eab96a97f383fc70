"""As much of CUDA as the build asks: toolkits of shell script, drivers of a few lines of C."""

import subprocess
from pathlib import Path


def script(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(("#!/bin/sh", *lines)))
    file.chmod(0o755)
    return file


def toolkit(folder: Path, release: str) -> Path:
    """As much of one as is asked before anything is compiled."""
    script(folder / "lib/libcudart_static.a")
    return script(
        folder / "bin/nvcc",
        'case "$1" in',
        f"--version) echo 'Cuda compilation tools, release {release}, V{release}.1';;",
        "--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\n';;",
        f"--dryrun) echo '#$ TOP={folder}';;",
        "esac",
    )


DRIVER = """\
static const int capabilities[][2] = {%s};
int cuInit(unsigned flags) { return %d; }
int cuDeviceGetCount(int *count) { *count = sizeof capabilities / sizeof *capabilities; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  if (attribute != 75 && attribute != 76) return 1;
  *value = capabilities[device - 7][attribute - 75];
  return 0;
}
"""


def driver(folder: Path, *capabilities: str, status: int = 0) -> Path:
    """As much of NVIDIA's as is asked for its GPUs, such as 9.0."""
    gpus = ", ".join(f"{{{capability.replace('.', ', ')}}}" for capability in capabilities)
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER % (gpus, status))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library
