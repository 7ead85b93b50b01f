#!/bin/sh
# Ask a running server about a picture with nothing but curl; prints the answer as the server's JSON.
#
#     ernie-gguf serve ernie-vl.gguf --mmproj ernie-vl-mmproj.gguf
#     sh examples/picture_server.sh page.png "What is written here?" http://127.0.0.1:8080
#
# The picture goes through a pipe: as an argument of curl it could be too long.
set -eu
picture=${1:?usage: sh picture_server.sh PICTURE [QUESTION] [ADDRESS]}
question=$(printf '%s' "${2:-What is written here?}" | sed 's/[\\"]/\\&/g')
address=${3:-http://127.0.0.1:8080}
test -r "$picture" || { echo "$picture: cannot be read" >&2; exit 1; }
{
    printf '{"max_tokens": 256, "temperature": 0, "messages": [{"role": "user", "content": ['
    # The server looks at the file itself, so that image/png may stand for JPEG, GIF and BMP too.
    printf '{"type": "image_url", "image_url": {"url": "data:image/png;base64,'
    base64 < "$picture" | tr -d '\n'
    printf '"}}, {"type": "text", "text": "%s"}]}]}' "$question"
} | curl --silent --show-error --fail-with-body "$address/v1/chat/completions" \
    --header 'Content-Type: application/json' --data-binary @-
