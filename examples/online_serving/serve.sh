#!/bin/sh
# Serve a model directory of any port to several clients: serve.sh MODEL [options of port-kit serve and vllm serve]
exec port-kit serve "$@"
