#!/bin/bash
# On each node: clusters/torchrun.sh NODE1, with the name of the first. In a Slurm job: srun --ntasks-per-node 1.
# python plan.py configs/13b.json --gpus 64 --gpu h100: 9.2 days for 257 billion tokens, 14,200 GPU hours, $56,600
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=12
export TORCH_CPP_LOG_LEVEL=ERROR LOGLEVEL=CRITICAL TORCH_LOGS=-distributed  # no word of a node that ends before another
exec torchrun --nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_id 13b --rdzv_endpoint "$1:29400" \
    train.py configs/13b.json
