#!/bin/sh
# A first frame and a prompt to a video with audio: run_curl_image_to_video.sh IMAGE [PROMPT [OUTPUT [-F name=value ...]]]
set -eu
image=${1:?"usage: run_curl_image_to_video.sh IMAGE [PROMPT [OUTPUT [-F name=value ...]]]"}
prompt=${2:-"She looks up and says, <S>One more song.<E> Audio: violin, steady rain."}
output=${3:-image_to_video.mp4}
shift $(($# < 3 ? $# : 3))
# --form-string: curl takes a text that begins with < for the name of a file
exec sh "$(dirname "$0")/../curl_video.sh" "$output" --form-string "prompt=$prompt" -F "input_reference=@$image" "$@"
