#!/bin/bash
# Open MPI. hosts: one line a node, "node1 slots=8"; rank 0 runs on the first.
# python plan.py configs/13b.json --gpus 64 --gpu h100: 9.2 days for 257 billion tokens, 14,200 GPU hours, $56,600
export PATH=$PWD/.venv/bin:$PATH TORCH_CPP_LOG_LEVEL=ERROR MASTER_ADDR=$(awk 'NR == 1 {print $1}' hosts)
# The variables that reach the nodes: mpirun passes on its own alone. Names only: what is on a command line, all can read.
pass_on=$(compgen -e | grep -E '^(AWS_|DS_|GLOO_|HF_|MASTER_|NCCL_|OMP_|PATH$|TIKTOKEN_|TORCH_|WANDB_)' | sed 's/^/-x /')
exec mpirun --hostfile hosts --bind-to none $pass_on python train.py configs/13b.json
