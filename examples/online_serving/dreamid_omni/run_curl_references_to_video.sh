#!/bin/sh
# Two people's images and voices to a video with audio:
#   run_curl_references_to_video.sh FOLDER [PROMPT [OUTPUT [-F name=value ...]]]
# FOLDER has a.png, b.png, a.wav and b.wav; `python client.py --samples FOLDER` writes some.
set -eu
folder=${1:?"usage: run_curl_references_to_video.sh FOLDER [PROMPT [OUTPUT [-F name=value ...]]]"}
people="<img1>: In the frame, a woman is identified as <sub1>. <img2>: In the frame, a man is identified as <sub2>."
prompt=${2:-"$people <sub1> says, <S>Hello there.<E>"}
output=${3:-references_to_video.mp4}
shift $(($# < 3 ? $# : 3))
# --form-string: curl takes a text that begins with < for the name of a file
exec sh "$(dirname "$0")/../curl_video.sh" "$output" --form-string "prompt=$prompt" \
    -F "input_references=@$folder/a.png" -F "input_references=@$folder/b.png" \
    -F "input_references=@$folder/a.wav" -F "input_references=@$folder/b.wav" "$@"
