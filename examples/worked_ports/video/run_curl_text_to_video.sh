#!/bin/sh
# A prompt to a video: run_curl_text_to_video.sh [PROMPT [OUTPUT [-F name=value ...]]]
set -eu
prompt=${1:-"a cat walks over a wet street at night"}
output=${2:-text_to_video.mp4}
shift $(($# < 2 ? $# : 2))
# --form-string: curl takes a text that begins with < for the name of a file
exec sh "$(dirname "$0")/curl_video.sh" "$output" --form-string "prompt=$prompt" "$@"
