"""The backend of CuPy arrays, with the functions of `_cpu`.

It is written to the Python array API standard, so that all of its logic also runs, and is tested, on the CPU. Work is
done in batched matrix products over chunks of tokens and heads that fit in the device's free memory; nothing waits for
the device but the checks of inputs and results, draws of samples, and reports.
"""
