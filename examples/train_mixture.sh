#!/bin/sh
# Train the science mixture of examples/mixtures: its scaling head beside frozen experts, then head and experts together.
#
#     sh examples/train_mixture.sh            # about an hour on two cores; goes on where it was if it is stopped
#
# Run from the root of a clone whose environment is on the path (`. .venv/bin/activate`).
set -eu
data=runs/mixed-data
experts=examples/adapters

[ -d "$data" ] || python examples/mixed_data.py --output "$data"
sources=""
for source in quantum materials protein peptides conversations; do
    sources="$sources --data $source=$data/$source.train.jsonl --eval-data $source=$data/$source.valid.jsonl"
done

# $sources is a list of words.
loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --layout xlora --output runs/mixture \
    --experts "quantum=$experts/quantum,materials=$experts/materials,protein=$experts/protein,peptides=$experts/peptides" \
    $sources --xlora-depth 2 --xlora-size 256 --xlora-dropout-p 0 \
    --learning-rate 2e-3 --warmup-steps 10 --steps 320 --batch-size 16 --eval-every 80 --seed 0

loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --layout xlora --output runs/mixture-joint \
    --init-from runs/mixture/science --use-trainable-adapters \
    $sources --learning-rate 3e-4 --warmup-steps 10 --steps 160 --batch-size 16 \
    --eval-every 80 --eval-records 40 --seed 1
