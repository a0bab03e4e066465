#!/bin/sh
# Serve a model directory and open its page: run_gradio_demo.sh MODEL [options of gradio_demo.py and port-kit serve]
# Both end with Ctrl-C.
exec python "$(dirname "$0")/gradio_demo.py" --model "$@"
