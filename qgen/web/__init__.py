"""`qgen web`: a page on which somebody draws with a model at 16 and at 4 bits, side by side, and sees what was lost.

    roots       which files a path field may reach          errors      every error as one plain sentence
    jobs        what runs, in which order, under which id   child       heavy work in a process of its own
    worker      what that process does: work_quantize, work_evaluate, evaluation_files, work_inspect, heat
    models      pairs of pipelines shared by all visitors   drawing     pictures of both from the same noise
    generate, quantize, evaluate, inspect, gallery          one tab each
    markup, style                                           what tabs are made of        app   the page as a whole

Gradio is imported when the page is built; a worker process never imports it.
"""
