#!/bin/sh
# Train the science mixture of examples/mixtures: its scaling head beside frozen experts, then head and experts together,
# twice.
#
#     sh examples/train_mixture.sh            # some two hours on two cores; goes on where it was if it is stopped
#
# Run from the root of a clone whose environment is on the path (`. .venv/bin/activate`).
set -eu
data=runs/mixed-data
experts=examples/adapters

sources_in() {
    for source in quantum materials protein peptides conversations; do
        echo "--data $source=$1/$source.train.jsonl --eval-data $source=$1/$source.valid.jsonl"
    done
}

[ -d "$data" ] || python examples/mixed_data.py --output "$data"
sources=$(sources_in "$data") # a list of words
loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --layout xlora --output runs/mixture \
    --experts "quantum=$experts/quantum,materials=$experts/materials,protein=$experts/protein,peptides=$experts/peptides" \
    $sources --xlora-depth 2 --xlora-size 256 --xlora-dropout-p 0 \
    --learning-rate 2e-3 --warmup-steps 10 --steps 320 --batch-size 16 --eval-every 80 --seed 0

loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --layout xlora --output runs/mixture-joint \
    --init-from runs/mixture/science --use-trainable-adapters \
    $sources --learning-rate 3e-4 --warmup-steps 10 --steps 160 --batch-size 16 \
    --eval-every 80 --eval-records 40 --seed 1

# More records, and peptides twice as often: their answers suffered most from sharing a prompt's beginning.
[ -d "$data-more" ] || python examples/mixed_data.py --train 2500 --output "$data-more"
sources=$(sources_in "$data-more")
loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --layout xlora --output runs/mixture-more \
    --init-from runs/mixture-joint/science --use-trainable-adapters \
    $sources --share quantum=1 --share materials=1 --share protein=1 --share peptides=2 --share conversations=1 \
    --learning-rate 3e-4 --warmup-steps 10 --steps 240 --batch-size 16 --eval-every 120 --eval-records 40 --seed 2
