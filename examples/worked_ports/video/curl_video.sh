#!/bin/sh
# One video as a job, with curl alone: curl_video.sh OUTPUT [fields of the form, as curl's -F name=value]
# It creates the job, asks until it is finished, writes the MP4 to OUTPUT and deletes the job. If the server refuses
# the request or the job fails, it prints the server's message and returns 1.
# BASE_URL is the address, API_KEY the key of a server that has some, POLL_SECONDS the time between two questions.
set -eu
output=${1:?"usage: curl_video.sh OUTPUT [-F name=value ...]"}
shift
videos="${BASE_URL:-http://127.0.0.1:8000}/v1/videos"
answer=$(mktemp)
job=

ask() { # ask PATH [options of curl]: the answer's body is in $answer; an error ends the script with its message
    path=$1
    shift
    # --fail-with-body: the body of an error has the server's message
    curl --silent --show-error --fail-with-body ${API_KEY:+--header "Authorization: Bearer $API_KEY"} \
        --output "$answer" "$videos$path" "$@" || { cat "$answer" >&2; echo >&2; exit 1; }
}

text() { # text NAME: the value of a field of the answer, a text without quotes
    sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p" "$answer"
}

finish() {
    if [ -n "$job" ]; then
        curl --silent ${API_KEY:+--header "Authorization: Bearer $API_KEY"} --request DELETE --output /dev/null \
            "$videos/$job" || true
    fi
    rm -f "$answer"
}
trap finish EXIT
trap 'exit 130' INT TERM

ask "" "$@"
job=$(text id)
while :; do
    case $(text status) in
        completed) break ;;
        queued | in_progress) sleep "${POLL_SECONDS:-2}" ;;
        *) cat "$answer" >&2; echo >&2; exit 1 ;;
    esac
    ask "/$job"
done
ask "/$job/content"
cat "$answer" >"$output"
echo "$output"
