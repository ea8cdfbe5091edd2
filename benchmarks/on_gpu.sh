#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and nvcc: builds, probes, tests and measures the engines for GPUs.
#
#   bash benchmarks/on_gpu.sh --total 330    a first call, whose numbers decide what is done next
#   bash benchmarks/on_gpu.sh --total 480    a second one goes on with what is left
#   bash benchmarks/on_gpu.sh --dry          says what would run
#
# benchmarks/on_gpu.py says more, and --help too. PYTHON: the interpreter, else python3.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
exec "${PYTHON:-python3}" benchmarks/on_gpu.py "$@"
