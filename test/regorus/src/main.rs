//! Reads one JSON document on standard input, a list of
//! {"policy": text, "t": {"data": ..., "input": ...}, "h": {"data": ..., "input": ...}},
//! and writes a list of {"t": answer, "h": answer}, where an answer is "true",
//! "false", "refused" (the text does not load) or "error" (no boolean).

use serde_json::{json, Value};
use std::io::Read;

macro_rules! oracle {
    ($name:ident, $engine:path) => {
        fn $name(policy: &str, side: &Value) -> &'static str {
            let mut engine = <$engine>::new();
            if engine.add_policy("policy.rego".into(), policy.into()).is_err() {
                return "refused";
            }
            engine.add_data_json(&side["data"].to_string()).expect("data");
            engine.set_input_json(&side["input"].to_string()).expect("input");
            match engine.eval_bool_query("data.policy.allow".into(), false) {
                Ok(true) => "true",
                Ok(false) => "false",
                Err(_) => "error",
            }
        }
    };
}

oracle!(t, regorus_t::Engine);
oracle!(h, regorus_h::Engine);

fn main() {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).expect("standard input");
    let cases: Vec<Value> = serde_json::from_str(&text).expect("a JSON list");
    let answers: Vec<Value> = cases
        .iter()
        .map(|c| {
            let policy = c["policy"].as_str().expect("policy");
            json!({"t": t(policy, &c["t"]), "h": h(policy, &c["h"])})
        })
        .collect();
    println!("{}", serde_json::to_string(&answers).expect("JSON"));
}
