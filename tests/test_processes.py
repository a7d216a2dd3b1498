"""Two processes hold the same queue and the same centre as one process that sees both batches."""
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cmid.contrast import KeyQueue, gather_keys
from cmid.distillation import PrototypeLoss

PROCESSES = 2


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2*PROCESSES, 6, generator=generator), torch.randn(2*PROCESSES, 5, 3, generator=generator)


def queue_and_centre(keys, logits):
    torch.manual_seed(1)
    queue, loss = KeyQueue(6, 7), PrototypeLoss(5)
    for _ in range(2):
        queue.enqueue(gather_keys(keys))
        loss(logits, logits, .04)
    return {f'queue.{k}': v for k, v in queue.state_dict().items()} | loss.state_dict()


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=PROCESSES)
    torch.save(queue_and_centre(*(a.chunk(PROCESSES)[rank] for a in inputs())), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=PROCESSES)
    one = queue_and_centre(*inputs())
    assert one['queue.filled'] == 7 and one['queue.ptr'] == 1
    for rank in range(PROCESSES):
        theirs = torch.load(tmp_path/f'{rank}.pt', weights_only=True)
        assert theirs.keys() == one.keys()
        for name, value in one.items(): torch.testing.assert_close(theirs[name], value, msg=f'{name} of process {rank}')
