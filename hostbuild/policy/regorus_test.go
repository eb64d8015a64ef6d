package policy

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// regorus is the program of test/regorus: `make regorus` builds it and runs this
// test with it, which then writes the golden file anew.
var regorus = flag.String("regorus", "", "program of test/regorus, to write the golden file with")

// nvflareText is the form of policy that NVFlare documents.
const nvflareText = "package policy\n\ndefault allow = false\n\nallow {\n    input[\"submods\"][\"cpu0\"][\"ear.veraison.annotated-evidence\"][\"snp\"][\"measurement\"] == \"theirs\"\n}\n"

// engineCase is one evaluation. T and H are what the two engines of Trustee said
// (regorus 0.2.8 and 0.11.0): "true", "false", "refused" or "error".
type engineCase struct {
	Name, Text string
	T, H       string
}

type engineGolden struct {
	Texts map[string]string
	Cases []engineCase
}

// TestRegorus compares with what the engines of Trustee answered: the texts that
// they were asked about must be those of today, OPA must agree with them on each,
// and so must the table of decisions.
func TestRegorus(t *testing.T) {
	rules := decisionRules(t)
	block := string(renderBlock(rules))
	texts := map[string]string{
		"generated":        string(Render(rules)),
		"below NVFlare's":  nvflareText + "\n" + block,
		"below own v1":     "package policy\n\nimport rego.v1\n\ndefault allow := false\n\nallow if data[\"resource-path\"] == \"resource/a/b/c\"\n\n" + block,
		"below no import":  "package policy\n\ndefault allow := false\n\n" + block,
		"no rule":          string(Render(nil)),
		"fail-open":        "package policy\n\ndefault allow := false\n\nallow if { false }\n",
		"fail-open, in":    "package policy\n\nimport future.keywords.in\n\ndefault allow := false\n\nallow if { false }\n",
		"NVFlare's":        nvflareText,
		"another word":     "package policy\n\ndefault allow = false\n\nallow when { false }\n",
		"undefined":        "package policy\n\nimport rego.v1\n\nallow if { false }\n",
		"not a boolean":    "package policy\n\nallow := \"yes\"\n",
		"two allow values": "package policy\n\nallow := true\n\nallow := false\n",
	}
	type side struct {
		Data  map[string]any `json:"data"`
		Input map[string]any `json:"input"`
	}
	type question struct {
		Policy string `json:"policy"`
		T      side   `json:"t"`
		H      side   `json:"h"`
	}
	var now engineGolden
	var questions []question
	now.Texts = texts
	for _, text := range []string{"generated", "below NVFlare's", "below own v1", "below no import"} {
		for _, d := range decisions() {
			now.Cases = append(now.Cases, engineCase{Name: d.name, Text: text})
			q := question{Policy: texts[text]}
			q.T.Data, q.T.Input = documents(true, d.path, d.evidence(true))
			q.H.Data, q.H.Input = documents(false, d.path, d.evidence(false))
			questions = append(questions, q)
		}
	}
	for _, text := range []string{"no rule", "fail-open", "fail-open, in", "NVFlare's", "another word", "undefined", "not a boolean", "two allow values"} {
		now.Cases = append(now.Cases, engineCase{Name: "sample evidence", Text: text})
		q := question{Policy: texts[text]}
		evidence := map[string]any{"sample": map[string]any{"svn": "1"}}
		q.T.Data, q.T.Input = documents(true, "keys/root/one", evidence)
		q.H.Data, q.H.Input = documents(false, "keys/root/one", evidence)
		questions = append(questions, q)
	}

	file := filepath.Join("testdata", "regorus.json")
	if *regorus != "" {
		askRegorus(t, questions, now, file)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var golden engineGolden
	if err := json.Unmarshal(b, &golden); err != nil {
		t.Fatal(err)
	}
	if len(golden.Cases) != len(now.Cases) {
		t.Fatalf("%d cases in %s, %d here: run `make regorus`", len(golden.Cases), file, len(now.Cases))
	}
	for name, text := range texts {
		if golden.Texts[name] != text {
			t.Errorf("the engines were asked about another text %q: run `make regorus`", name)
		}
	}
	for i, c := range golden.Cases {
		if c.Name != now.Cases[i].Name || c.Text != now.Cases[i].Text {
			t.Fatalf("case %d is %q of %q, here %q of %q: run `make regorus`", i, c.Name, c.Text, now.Cases[i].Name, now.Cases[i].Text)
		}
		q := questions[i]
		text := []byte(q.Policy)
		if open := len(FailOpen(text)) > 0; open {
			// What OPA does not show, and why such a text is never uploaded.
			if c.T != "true" {
				t.Errorf("%s: regorus 0.2.8 said %s, want the fail-open", c.Text, c.T)
			}
			continue
		}
		if got := answer(text, true, q.T.Data, q.T.Input); got != c.T && c.T != "true" {
			t.Errorf("%s of %s, as T: OPA %s, regorus 0.2.8 %s", c.Name, c.Text, got, c.T)
		} else if c.T == "true" && got != "true" && len(Check(text)) == 0 {
			t.Errorf("%s of %s, as T: regorus 0.2.8 allows what OPA does not (%s), and Check says nothing", c.Name, c.Text, got)
		}
		if got := answer(text, false, q.H.Data, q.H.Input); got != c.H {
			t.Errorf("%s of %s, as H: OPA %s, regorus 0.11.0 %s", c.Name, c.Text, got, c.H)
		}
	}
	for i, d := range decisions() { // the first cases are of the generated text
		want := map[bool]string{true: "true", false: "false"}[d.want]
		if c := golden.Cases[i]; c.T != want || c.H != want {
			t.Errorf("%s: regorus 0.2.8 %s, 0.11.0 %s, want %s", d.name, c.T, c.H, want)
		}
	}
}

// askRegorus has both engines answer and writes the golden file.
func askRegorus(t *testing.T, questions any, golden engineGolden, file string) {
	t.Helper()
	in, err := json.Marshal(questions)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), *regorus)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var answers []struct{ T, H string }
	if err := json.Unmarshal(out, &answers); err != nil || len(answers) != len(golden.Cases) {
		t.Fatalf("%d answers (%v), want %d", len(answers), err, len(golden.Cases))
	}
	for i, a := range answers {
		golden.Cases[i].T, golden.Cases[i].H = a.T, a.H
	}
	b, err := json.MarshalIndent(golden, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}
