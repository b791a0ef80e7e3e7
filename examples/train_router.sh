#!/bin/sh
# One-pass routers for the science mixture, whose second pass they save: one that learns from the answers, one that the
# X-LoRA teaches, and one that then trains on with its experts, with some prompts of two questions.
#
#     sh examples/train_router.sh             # some hours on two cores; goes on where it was if it is stopped
#
# Run from the root of a clone whose environment is on the path (`. .venv/bin/activate`).
set -eu
data=runs/mixed-data
science=examples/mixtures/science

[ -f "$data/two-questions.train.jsonl" ] || python examples/mixed_data.py --output "$data"
sources=""
for source in quantum materials protein peptides conversations; do
    sources="$sources --data $source=$data/$source.train.jsonl --eval-data $source=$data/$source.valid.jsonl"
done
experts=""
for domain in quantum materials protein peptides; do
    experts="$experts --experts $domain=$science/$domain"
done

loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --output runs/router-linear \
    --router linear $experts $sources --learning-rate 3e-3 --warmup-steps 5 --steps 300 --batch-size 16 --eval-every 50

loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --output runs/router-distilled \
    --router linear --teacher "$science" --answer-weight 0 $sources \
    --learning-rate 5e-3 --warmup-steps 5 --steps 300 --batch-size 16 --eval-every 50

shares=""
for source in quantum materials protein peptides conversations; do shares="$shares --share $source=1"; done
loraplex train mixture --model smollm2-135m --dtype bfloat16 --name science --output runs/router-joint \
    --router linear --init-from runs/router-distilled/science --train-experts $sources $shares \
    --data two-questions=$data/two-questions.train.jsonl --eval-data two-questions=$data/two-questions.valid.jsonl \
    --share two-questions=0.5 --learning-rate 3e-4 --warmup-steps 10 --steps 240 --batch-size 16 --eval-every 60
