#!/bin/sh
# Two people's pictures and voices to a video, with curl alone: client.sh FOLDER OUTPUT [more fields, as -F name=value]
# FOLDER holds a.png, b.png, a.wav and b.wav; `python client.py --samples FOLDER` writes some. SERVER is the address.
# API_KEY is the key of a server that has some.
set -eu
folder=${1:?"usage: client.sh FOLDER OUTPUT [-F name=value ...]"}
output=${2:?"usage: client.sh FOLDER OUTPUT [-F name=value ...]"}
shift 2
# --form-string: curl takes a text that begins with < for the name of a file.
# --fail-with-body: a refused request ends with an error, and its reason is printed.
curl --silent --show-error --fail-with-body "${SERVER:-http://127.0.0.1:8000}/v1/videos/sync" --output "$output" \
    ${API_KEY:+--header "Authorization: Bearer $API_KEY"} \
    --form-string "prompt=<img1>: In the frame, a woman is identified as <sub1>. <img2>: In the frame, a man is identified as <sub2>. <sub1> says, <S>Hello there.<E>" \
    -F "input_references=@$folder/a.png" -F "input_references=@$folder/b.png" \
    -F "input_references=@$folder/a.wav" -F "input_references=@$folder/b.wav" \
    "$@" || { test -f "$output" && cat "$output" >&2 && rm "$output"; exit 1; }
