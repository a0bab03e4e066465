#!/bin/sh
# Serve Ovi: run_server.sh [MODEL] [options of port-kit serve and vllm serve]; MODEL is the directory ovi by default.
set -eu
model=ovi
case ${1:--} in -*) ;; *) model=$1; shift ;; esac
exec sh "$(dirname "$0")/../serve.sh" "$model" "$@"
