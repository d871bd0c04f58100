#!/bin/bash
# mpi.sh, with mpirun called by DeepSpeed's launcher, which sets `--mca btl_tcp_if_include eth0` unless it is given.
# python plan.py configs/13b.json --gpus 64 --gpu h100: 9.2 days for 257 billion tokens, 14,200 GPU hours, $56,600
export PATH=$PWD/.venv/bin:$PATH TORCH_CPP_LOG_LEVEL=ERROR MASTER_ADDR=$(awk 'NR == 1 {print $1}' hosts)
unset "${!MLFLOW_@}" # DeepSpeed puts their values on mpirun's command line, which all can read; here are names alone
pass_on=$(compgen -e | grep -E '^(AWS_|DS_|GLOO_|HF_|MASTER_|OMP_|TIKTOKEN_|TORCH_|WANDB_)' | sed 's/^/-x /' | tr '\n' ' ')
exec deepspeed -q --hostfile hosts --launcher openmpi --launcher_args="--bind-to none $pass_on" train.py configs/13b.json
