"""One process, one event loop: a node, a server with one expert, and a step of training through the network."""

import torch

import tesseract_async as ta


async def main() -> None:
    expert_module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    adam = torch.optim.Adam(expert_module.parameters())
    backend = ta.ExpertBackend(expert_module, optimizer=adam, args_schema=(ta.TensorSpec((8,)),))
    async with ta.TesseractNode() as node, ta.TesseractServer(node, {"ffn.3.7": backend}):
        expert = await node.get_expert("ffn.3.7")
        x = torch.randn(4, 8, requires_grad=True)
        for _ in range(100):
            loss = (await expert(x) - x.detach()).square().mean()
            await ta.backward(loss)  # the loop stays free; the expert takes its optimizer step
        print(f"loss after 100 steps: {loss.item():.4f}; gradient of the input: {tuple(x.grad.shape)}")


ta.run(main())  # asyncio.run, and Ctrl-C leaves without a traceback
