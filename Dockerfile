# `pace serve` on a GPU, with vLLM in the same image.
#
#     docker build -t pace-serve .
#     docker run --gpus all -p 127.0.0.1:8000:8000 -v ./out:/out:ro -v banks:/banks pace-serve \
#         /out --host 0.0.0.0 --engine vllm --bank-dir /banks --bank-size 50GB
#
# In a container --host 0.0.0.0 is the container's own network; what the machine shows is -p's to say.
FROM vllm/vllm-openai:v0.32.0
COPY . /src
# vLLM's own pins decide between versions that both take.
RUN pip freeze > /tmp/pins.txt && pip install --no-cache-dir -c /tmp/pins.txt "/src[serve]"
ENTRYPOINT ["pace", "serve"]
CMD ["--help"]
