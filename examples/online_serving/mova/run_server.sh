#!/bin/sh
# Serve MOVA: run_server.sh [MODEL] [options of port-kit serve and vllm serve]; MODEL is the directory mova by default.
set -eu
model=mova
case ${1:--} in -*) ;; *) model=$1; shift ;; esac
exec sh "$(dirname "$0")/../serve.sh" "$model" "$@"
