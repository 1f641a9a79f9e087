"""How the page looks, and what a pointer over its pictures tells."""

# Colours are seen on white and on black, and runs differ in their dashes, too.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1e21;--dim:#5f666d;--rule:#dfe3e6;--card:#f7f8f9;
--run0:#0b62c4;--run1:#c9353f;--run2:#1c7d45;--run3:#96660a;--run4:#7a3fb0;--run5:#00798a;
--find:#0b62c4;--pack:#6aa5e8;--wait:#b9bec4;--unpack:#f0a35a;--settle:#c9353f;--balance:#7a3fb0;
--average:#1c7d45;--other:#7d858c}
@media (prefers-color-scheme:dark){:root{--bg:#15181b;--fg:#e4e7ea;--dim:#9aa3ab;--rule:#32383d;
--card:#1c2024;--run0:#6cb0ff;--run1:#ff8087;--run2:#62cf8e;--run3:#e3b34f;--run4:#c39af0;
--run5:#4fcfdf;--find:#6cb0ff;--pack:#2f6db5;--wait:#596168;--unpack:#e3914a;--settle:#ff8087;
--balance:#c39af0;--average:#62cf8e;--other:#8d969e}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 28px 60px;max-width:1400px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:24px;margin:0}h2{font-size:18px;margin:36px 0 2px}
p{margin:2px 0 12px;max-width:75ch;color:var(--dim)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:5px 10px 5px 0;text-align:right;border-bottom:1px solid var(--rule)}
th{font-weight:600;color:var(--dim);font-size:12.5px;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
.panels{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
figure{margin:0;padding:12px 14px;background:var(--card);border:1px solid var(--rule);
border-radius:8px;max-width:900px}
figcaption{font-weight:600;margin-bottom:6px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--dim);font-size:11.5px}svg .small{font-size:10px}
svg .end{text-anchor:end}svg .middle{text-anchor:middle}
svg image{image-rendering:pixelated}svg.key{max-width:320px}
.grid{stroke:var(--rule)}.axis{stroke:var(--dim)}
polyline{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
polyline.layer{stroke-width:1.2;opacity:.75}polyline.many{stroke-width:1;opacity:.5}
polyline.on{stroke-width:3!important;opacity:1!important}
.dash1{stroke-dasharray:7 4}.dash2{stroke-dasharray:2 4}.dash3{stroke-dasharray:9 3 2 3}
.dash4{stroke-dasharray:4 3}.dash5{stroke-dasharray:12 4}
.dense{stroke-dasharray:1 5;opacity:.8}
.keys{display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 10px;padding:0;list-style:none;
font-size:13.5px}
.keys svg{display:inline-block;width:30px;height:10px;margin-right:6px}
.keys i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:6px}
.fade{display:inline-block;width:90px;height:8px;border-radius:4px;margin:0 6px;
background:linear-gradient(90deg,hsl(215 75% 55%),hsl(295 45% 56%),hsl(385 80% 54%))}
#tip{position:fixed;pointer-events:none;background:var(--fg);color:var(--bg);padding:4px 9px;
border-radius:5px;font-size:13px;max-width:420px;overflow-wrap:anywhere;z-index:9}
details{margin-top:10px}summary{cursor:pointer;color:var(--dim)}
.warn{color:var(--run1)}
@media print{body{max-width:none}figure{break-inside:avoid}}
"""

SCRIPT = """
const tip=document.createElement('div');tip.id='tip';tip.hidden=true;document.body.append(tip);
const show=(e,text)=>{tip.hidden=false;tip.textContent=text;
 const w=tip.offsetWidth;tip.style.left=Math.max(4,Math.min(e.clientX+14,innerWidth-w-8))+'px';
 tip.style.top=(e.clientY+16)+'px'};
const at=(svg,e)=>new DOMPoint(e.clientX,e.clientY).matrixTransform(svg.getScreenCTM().inverse());
const value=(a,p)=>{const s=(p-a[0])/(a[1]-a[0]);
 return a[4]?Math.exp(Math.log(a[2])+s*Math.log(a[3]/a[2])):a[2]+s*(a[3]-a[2])};
for(const svg of document.querySelectorAll('svg.lines')){
 let axes,lines,on;
 svg.addEventListener('pointermove',e=>{
  axes??=JSON.parse(svg.dataset.axes);
  lines??=[...svg.querySelectorAll('polyline')].map(l=>[l,l.getAttribute('points').split(' ')
   .map(p=>p.split(',').map(Number))]);
  const m=at(svg,e);let best=40*40,hit;
  for(const[l,points]of lines)for(const[x,y]of points){
   const d=(x-m.x)**2+(y-m.y)**2;if(d<best){best=d;hit=[l,x,y]}}
  on?.classList.remove('on');on=hit?.[0];
  if(!hit){tip.hidden=true;return}
  on.classList.add('on');
  show(e,on.dataset.name+', step '+Math.round(value(axes.x,hit[1]))+': '+
   Number(value(axes.y,hit[2]).toPrecision(3)))});
 svg.addEventListener('pointerleave',()=>{on?.classList.remove('on');tip.hidden=true})}
for(const svg of document.querySelectorAll('svg.map')){
 let map,levels;
 svg.addEventListener('pointermove',e=>{
  map??=JSON.parse(svg.dataset.map);levels??=atob(map.levels);
  const m=at(svg,e),[x,y,w,h]=map.box,rows=map.names.length,columns=map.steps.length;
  const c=Math.floor((m.x-x)/w*columns),r=Math.floor((m.y-y)/h*rows);
  if(c<0||c>=columns||r<0||r>=rows){tip.hidden=true;return}
  const level=levels.charCodeAt(r*columns+c);
  const share=Math.exp(map.log[0]+(level-1)/254*(map.log[1]-map.log[0]));
  show(e,map.names[r]+', step '+map.steps[c]+': '+
   (level?Number((100*share).toPrecision(3))+' %':'nothing sent'))});
 svg.addEventListener('pointerleave',()=>{tip.hidden=true})}
"""
