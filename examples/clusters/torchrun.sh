#!/usr/bin/env bash
# Pretrains on all GPUs of this machine; the same command starts a run and continues it. Checked by lint, not yet run
# on a cluster. Where node-a is one of four machines, start on each: NODES=4 HEAD=node-a examples/clusters/torchrun.sh
# Change: the shared folder and the flags of ajepa.train; arguments of this script come after them. Pack once, before:
#   python -m ajepa.pack /shared/recordings /shared/shards
set -euo pipefail

shared=${SHARED:-/shared} # on a file system that all machines share: shards, run folder, cache
export AJEPA_CACHE=$shared/cache/ajepa
export NCCL_DEBUG=WARN # the only setting of NCCL; NCCL_SOCKET_IFNAME names the network if it chooses the wrong one
# Seconds from torchrun's SIGTERM to its SIGKILL. A step and a save must fit into them. Older releases of torch do not
# read this, and wait for 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

rendezvous=(--standalone)
if [[ ${NODES:-1} -gt 1 ]]; then
  rendezvous=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-id=ajepa
    --rdzv-endpoint="${HEAD:?set it to the name of one of the machines}:29500")
fi

# If a rank dies, the others end within --rank-timeout. torchrun then starts all of them again, and --resume continues
# from the last checkpoint. `exec` lets SIGTERM reach torchrun, which passes it on to the ranks. A model that does not
# fit takes --parallel fsdp; docs/many-gpus.md compares it with ddp and zero1, and explains --reduce bf16.
exec torchrun "${rendezvous[@]}" --nproc-per-node="${GPUS:-gpu}" --max-restarts=3 \
  -m ajepa.train --preset audio-jepa --data "$shared/shards" --out "$shared/runs/audio-jepa" --resume \
  --batch-size 2048 --parallel ddp --rank-timeout 120 --checkpoint-every 500 "$@"
