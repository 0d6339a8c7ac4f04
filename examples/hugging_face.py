"""A model of Hugging Face's transformers that attends by this library: a step of training, then generated tokens."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lingrad_rs.torch as lgt

lgt.register_hugging_face("lingrad")  # exact; with tol=1e-2, each head is within it, or exact

# Random weights; LlamaForCausalLM.from_pretrained(folder, attn_implementation="lingrad") has learned ones.
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="lingrad",
)
model = LlamaForCausalLM(config)
text = b"attention on a CPU, in almost linear time, with the error known"
tokens = torch.tensor([list(text)])

loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
print(f"loss {loss.item():.3f}, gradient of the embedding {model.model.embed_tokens.weight.grad.norm().item():.3f}")

model.set_attn_implementation("sdpa")
print(f"loss by PyTorch's own attention {model(input_ids=tokens, labels=tokens).loss.item():.3f}")

model.set_attn_implementation("lingrad")
new = model.eval().generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
print("tokens of a model that has learned nothing:", new[0, tokens.shape[1] :].tolist())
