#!/bin/sh
# Serve DreamID-Omni: run_server.sh [MODEL] [options of port-kit serve and vllm serve]; MODEL is the directory dreamid_omni by default.
set -eu
model=dreamid_omni
case ${1:--} in -*) ;; *) model=$1; shift ;; esac
exec sh "$(dirname "$0")/../serve.sh" "$model" "$@"
