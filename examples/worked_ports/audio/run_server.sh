#!/bin/sh
# Serve murmur: run_server.sh MODEL [options of port-kit serve and vllm serve]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
export PORT_KIT_PATH="$here:${PORT_KIT_PATH:-}"
exec port-kit serve "$@"
