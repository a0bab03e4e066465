#!/bin/sh
# Serve a model directory of any port: serve.sh MODEL [options of vllm serve]
# Finished videos are kept in ./videos for a day, or as VLLM_OMNI_SERVER_STORAGE__PATH and ..__FILE_TTL (seconds) say.
set -eu
model=${1:?"usage: serve.sh MODEL [options of vllm serve]"}
shift
export VLLM_OMNI_SERVER_STORAGE__PATH="${VLLM_OMNI_SERVER_STORAGE__PATH:-$PWD/videos}"
export VLLM_OMNI_SERVER_STORAGE__FILE_TTL="${VLLM_OMNI_SERVER_STORAGE__FILE_TTL:-86400}"
exec vllm serve "$model" --omni --middleware port_kit.runtime.serving.CancelOnDisconnect "$@"
