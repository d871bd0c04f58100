#!/bin/bash
# DeepSpeed's launcher, which reaches the nodes by pdsh and ssh. hosts: one line a node, "node1 slots=8".
# python plan.py configs/13b.json --gpus 64 --gpu h100: 9.2 days for 257 billion tokens, 14,200 GPU hours, $56,600
export PATH=$PWD/.venv/bin:$PATH TORCH_CPP_LOG_LEVEL=ERROR
# DeepSpeed passes on PYTHON*, UCX* and, with GPUs, NCCL*; the rest only from this file. All of it is on command lines,
# which all can read, so keys, tokens and passwords stay here.
unset "${!MLFLOW_@}"
env | grep -E '^(AWS_|DS_|GLOO_|HF_|OMP_|TIKTOKEN_|TORCH_|WANDB_)' |
    grep -vE '^[^=]*_(KEY|TOKEN|SECRET|PASS)' > .deepspeed_env
# -N: no "node1: " in front of lines. The second --quiet is for the launchers on the nodes, which -q does not reach.
exec deepspeed -q --hostfile hosts --launcher_args=-N -- --quiet train.py configs/13b.json
