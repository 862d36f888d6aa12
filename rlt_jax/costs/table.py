def render(plan):
    import json

    return json.dumps(plan, indent=1)
