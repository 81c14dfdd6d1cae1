"""What people see of a quantized model: a table in the terminal, a page for the browser, pictures before and after.

`qgen.summary` and `qgen.report` live here and not in modules `qgen.summary` and `qgen.report`: importing a module of that name would put
the module in the function's place.
"""
